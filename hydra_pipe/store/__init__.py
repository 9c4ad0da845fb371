"""The only home of everything on disk: names, attributes, versions, codecs, commit marks.

docs/format.md is the specification.
"""
