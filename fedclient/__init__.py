"""What runs on a device: base model, data, local training, and the Flower ClientApp around them."""
