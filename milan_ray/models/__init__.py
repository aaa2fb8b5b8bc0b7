"""What is dissected: models by name, how images become their inputs, and what their layers put out."""
