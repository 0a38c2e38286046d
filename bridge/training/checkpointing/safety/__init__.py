"""Reading a checkpoint as data: nothing in it runs code or leads out of its directory."""
