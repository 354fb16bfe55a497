"""The command line: one module a command, each with `add_arguments(parser)` and `run(args) -> exit code`.

Must not know what is below `Image` and the daemon. Nothing heavy is imported before a command runs.
"""
