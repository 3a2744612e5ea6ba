"""The probes: each looks at one thing, and says in checks what it has found."""
