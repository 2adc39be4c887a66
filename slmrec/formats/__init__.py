"""Raw input files: interaction logs in eight formats, and tables of item titles."""
