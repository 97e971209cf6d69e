package audit

import (
	"bufio"
	"errors"
	"io"
)

// lineReader reads lines of bounded length. A longer one, which is no record,
// comes in parts.
type lineReader struct {
	r     *bufio.Reader
	split bool // the last part was not the end of its line
}

func newLineReader(r io.Reader) *lineReader {
	return &lineReader{r: bufio.NewReaderSize(r, maxLine+1)}
}

// next returns the next line without its newline, which is valid until the next
// call; newline says whether there was one, whole whether this is all of the
// line. At the end the error is io.EOF.
func (l *lineReader) next() (line []byte, newline, whole bool, err error) {
	line, err = l.r.ReadSlice('\n')
	part := l.split
	switch {
	case err == nil:
		l.split = false
		return line[:len(line)-1], true, !part, nil
	case errors.Is(err, bufio.ErrBufferFull):
		l.split = true
		return line, false, false, nil
	case errors.Is(err, io.EOF) && len(line) > 0:
		l.split = false
		return line, false, !part, nil
	}
	return nil, false, false, err
}
