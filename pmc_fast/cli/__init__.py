"""The command line: commands, options from settings, output."""
