"""What a place in object storage holds: looked at by listings, markers and small files, without a copy of it.

Only a checkpoint with its marker counts. Which one a run would load is found out by the code that a run finds it with.
"""
