"""Models, tokenizers, audio files, training and the command line, in plain Python above audiokernels."""
