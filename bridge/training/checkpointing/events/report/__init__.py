"""One page that shows what the saves of a run have cost, and what became of its checkpoints.

`gathering` reads a directory, `view` makes of that what is shown, `charts` draws, and `page` writes HTML. All but
`gathering` are pure.
"""
