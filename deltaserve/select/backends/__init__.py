"""Where the steps run: in this process, in several, or on a Ray cluster; the result is the same."""
