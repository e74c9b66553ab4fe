"""What `import bardlet` offers. The commands parse a command line, call these functions and print."""
