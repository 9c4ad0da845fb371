"""The only home of names, attributes, versions, codecs and commit marks on disk. docs/format.md is its specification."""
