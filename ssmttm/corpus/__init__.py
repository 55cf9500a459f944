"""Where audio and captions come from, and how they become token shards on disk."""
