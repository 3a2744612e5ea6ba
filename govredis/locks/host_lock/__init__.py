"""Host locks: they keep the holders on one host apart by lock files, whatever Redis does."""
