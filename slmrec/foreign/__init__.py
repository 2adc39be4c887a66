"""Reading what other programs wrote: pickles, tensor files, folders of trained recommenders, item tables."""
