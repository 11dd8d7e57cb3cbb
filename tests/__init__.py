"""The tests: names are sentences, real things instead of mocks."""
