"""`optimum-cli llava-ov ...`. Light to import: this is read at every start of `optimum-cli`."""
