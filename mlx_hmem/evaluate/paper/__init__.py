"""What only the replication of the paper needs: counts, blocking, routing."""
