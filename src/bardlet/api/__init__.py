"""The Python API. The commands parse a command line, call these functions and print."""
