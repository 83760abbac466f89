"""
OpenAI's wire format, as far as the gateway reads it.

Source of the shapes: OpenAI's OpenAPI description, version 2.3.0, and the Python SDK 3.54. A request struct lists every
field OpenAI documents, so that each is type-checked; what the gateway does not look into is typed `Raw` or `Any` and
forwarded as it came. Answer structs list only what is read.
"""
