"""The book's pipeline: MyST text to executed notebook to rendered page, without dirtying the tree."""
