"""What does each endpoint take and give? The handlers are thin: read, hand to the pipeline, write."""
