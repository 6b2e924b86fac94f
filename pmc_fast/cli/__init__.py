"""The command line: commands, options from the settings' fields, what is printed."""
