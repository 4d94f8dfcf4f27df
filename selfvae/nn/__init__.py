"""Neural networks: layers, blocks, flows, and the networks of a level."""
