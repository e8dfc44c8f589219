"""The demo: renders a small multimodal data set with exact ground truth, trains a 4M model on it, and reports."""
