"""What an encoder became: geometry, similarity, probes."""
