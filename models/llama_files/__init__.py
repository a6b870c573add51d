"""Files of Llama-type weights, each opened into `layout.Weights`."""
