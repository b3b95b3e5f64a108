"""Generation: sampling responses, and conversations with environments."""
