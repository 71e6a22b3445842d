"""Thin Ray shells around the plain objects of learning/ and planning/. Only these files import ray."""
