"""What is to be learned: episodes, environments, dataset readers, demonstrators and scores. Needs numpy, gymnasium and h5py only."""
