"""What happens to checkpoints, as one typed stream, and where it goes (docs/events.md).

`kinds` are the events, `stream` brings them to sinks off the critical path, `recording` makes them in a save or a load,
`file` keeps them in the save directory, and `sinks` brings them to other programs.
"""
