"""Reports: self-contained HTML pages, which load nothing from other files or the network, and Markdown and JSON."""
