"""The command line: flags to a config, one library call, one print."""
