"""What a decode believed, as data, in the terminal and as a page; figures of recipes."""
