"""Dense features of videos and images: extracted in batches, written to files, shown as colours."""
