"""What frozen features know: k-NN and attentive classification, linear segmentation and depth, and
masks carried through a video. Nothing here trains an encoder."""
