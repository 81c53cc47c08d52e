"""Takes studies over REST, decides what to try next, and shows the answer."""
