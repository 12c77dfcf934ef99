"""The backbone and what is put on it: adapters, value, reference, classifier."""
