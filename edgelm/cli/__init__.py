"""The command line: parse, call, print. One module per command, imported only when that command runs."""
