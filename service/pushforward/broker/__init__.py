"""Getting chunks to workers and answers back: the contract, and worker processes of this machine."""
