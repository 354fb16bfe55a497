"""Where a disk's data lies, as a picture: summed up, laid out, drawn.

Must not know the command line.
"""
