"""The programs that events are brought to, one module each. Each needs a library of its own, an optional extra."""
