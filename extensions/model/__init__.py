"""The language model: loading, adapters, roles. The only package that imports peft."""
