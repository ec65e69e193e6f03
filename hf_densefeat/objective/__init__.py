"""The dense-feature objective: functions of the second moments of embeddings."""
