"""Settings read within a function, as a module of a package: nanoGPT's configurator goes by globals() too."""
batch_size = 12
words = ['a']
types = 'a setting'


def main():
    exec(open('configurator.py').read())
    return batch_size, words, types


print(main())
