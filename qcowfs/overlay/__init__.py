"""What moves between an overlay and its backing file: commit and rebase.

Must not know the command line.
"""
