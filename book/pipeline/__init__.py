"""The book's pipeline: MyST text to executed notebook to page, without dirtying the tree."""
