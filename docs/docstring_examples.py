"""How the site reads docstrings."""

import griffe


class DocstringExamples(griffe.Extension):
    """Reads the section `Example:`, as it does `Examples:`, as code and what it gives."""

    def on_object(self, *, obj, **kwargs):
        """Called by griffe with everything it has read."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
