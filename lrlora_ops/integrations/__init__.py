"""Bridges to other libraries; each file imports its library, so import them on use."""
