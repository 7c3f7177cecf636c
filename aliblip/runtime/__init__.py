"""What any program on several processes needs: flags, launch, collectives, files, signals. Nothing of photos."""
