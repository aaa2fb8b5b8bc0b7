"""Objects pasted into images by what units say."""
