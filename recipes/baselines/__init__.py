"""The peers that the study compares with."""
