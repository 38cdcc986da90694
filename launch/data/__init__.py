"""What a model is trained on: data sets, the order of their samples, augmentation and loading."""
